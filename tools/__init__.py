"""What to do with a model: python -m tools.NAME"""
