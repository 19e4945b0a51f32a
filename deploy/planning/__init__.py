"""Plans a deployment: model, layout, speed, engine options, and the plan with its commands."""
