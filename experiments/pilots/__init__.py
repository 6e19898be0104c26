"""In which regime do algorithms differ, and what does a run cost?"""
