"""The loss inside other libraries' models: one file a library, imported only by whoever asks for it."""
