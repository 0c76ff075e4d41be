"""The loss inside other libraries' models: one file per library. The package itself imports none of them."""
