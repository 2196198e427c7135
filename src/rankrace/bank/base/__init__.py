"""Products with a frozen layer, one file a kind: weights as they came, in 4 bits, in 8.

Shapes: K candidates, T tokens of all of them, D / O the widths of the layer's input and output, R padded rank.
"""

from torch import nn
from transformers.pytorch_utils import Conv1D

from rankrace.bank.base.fp8 import Fp8Linear, Fp8Product
from rankrace.bank.base.nf4 import Nf4Product, is_4bit
from rankrace.bank.base.own import OwnProduct
from rankrace.bank.base.plain import PlainProduct
from rankrace.bank.base.product import Product, Rounds


def product_of(base: nn.Module, switch: Rounds) -> Product:
    """How the bank multiplies with this layer."""
    if type(base) is nn.Linear:
        return PlainProduct(base, lambda: base.weight)
    if type(base) is Conv1D:
        return PlainProduct(base, lambda: base.weight.T)
    if is_4bit(base):
        return Nf4Product(base)
    if isinstance(base, Fp8Linear):
        return Fp8Product(base, switch)
    return OwnProduct(base)
