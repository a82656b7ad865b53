"""The images of a prompt set, in the layout that the public evaluators read."""
