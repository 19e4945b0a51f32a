"""What will run where: model, layout, speed, engine options, and the plan with its commands."""
