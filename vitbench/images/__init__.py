"""Images as people keep them: files and columns of bytes become RGB pixels, names of folders and columns become labels."""
