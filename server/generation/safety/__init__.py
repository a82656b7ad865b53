"""What may be asked for and shown: checkers of prompts and of images, and the verdicts that they give."""
