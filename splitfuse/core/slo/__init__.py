"""Schedules by SLO: predicts the time of steps, orders requests by deadline, admits or rejects."""
