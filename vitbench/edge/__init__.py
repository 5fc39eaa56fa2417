"""Other devices: a bundle that measures models there, and a model of what they cost where nobody measured."""
