"""Training, without clean data or with some. `loss` and `fit` need torch alone; `triplets` reads volumes."""
