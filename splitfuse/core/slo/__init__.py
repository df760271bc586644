"""Scheduling for latency targets: predict the time of a step, order requests by deadline, admit or refuse."""
