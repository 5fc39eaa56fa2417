"""What every other part stands on: files that appear whole, and the store of work that can be resumed.

Modules here import the standard library, the errors and the paths, and nothing of models, data or rows. A helper belongs
here when two rooms need it and it knows nothing of Vision Transformers.
"""
