"""What tells costs: multiply-adds, speed, stages of generation, schedules that keep a budget, and checks."""
