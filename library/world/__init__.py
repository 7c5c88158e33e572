"""A small world of drawn scenes, the text-to-image model that knows it, and a judge of its pictures."""
