"""Which smooth gate, and how sharp?"""
