"""What a Vision Transformer is: the weights that people have of one, and the multiply-accumulates that it takes."""
