"""What will be built, as values: recipe, stack, locks, plan and its build id."""
