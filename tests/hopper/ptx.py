def translate(ptx): raise NotImplementedError
