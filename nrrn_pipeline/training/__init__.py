"""Training without clean data. `loss` and `fit` need torch alone; `triplets` reads volumes."""
