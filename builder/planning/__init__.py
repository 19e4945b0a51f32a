"""The values that describe a build: recipe, stack, locks, and the plan with its build id.

`builder/toolchains/choice.py` makes the plans.
"""
