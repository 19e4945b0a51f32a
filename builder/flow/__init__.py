"""The order of the stages of a build, a rebuild and `builder run`. Only this folder knows the order."""

STAGES = ("fetch", "root", "compile", "audit", "smoke", "record", "publish")
