"""What torch.compile is told of this package's functions, without importing the compiler."""


def constant(function):
    """`torch.compiler.assume_constant_result`: the function is called while tracing, and what it returns is a constant.

    That one imports torch._dynamo to set this mark, which takes half as long as PyTorch itself.
    """
    function._dynamo_marked_constant = True
    return function
