"""What do algorithms make of the same stale completions, and which gradient is right?"""
