"""Content policy: checkers of prompts and images, and their verdicts."""
