"""Where a step's time goes: named ranges, what a profiler's trace says of them, and a page a human reads."""
