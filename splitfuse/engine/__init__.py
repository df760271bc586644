"""Runs the loop (schedule, execute, update): token ids in, token ids out; in a thread, a process or several."""
