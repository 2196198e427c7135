"""K LoRA adapters of different ranks on one frozen base model. Needs torch and Transformers only.

A base in 4 bits needs bitsandbytes, too.
"""

from rankrace.bank.allocate import allocate
from rankrace.bank.attach import Bank
from rankrace.bank.candidates import Candidates
from rankrace.bank.carry import carried
from rankrace.bank.export import Adapter, adapter_of, lora_config, save_adapter
from rankrace.bank.quantize import check_quantize, quantize
from rankrace.bank.spectrum import Spectrum, spectrum

__all__ = [
    "Adapter", "Bank", "Candidates", "Spectrum", "adapter_of", "allocate", "carried", "check_quantize", "lora_config",
    "quantize", "save_adapter", "spectrum",
]  # fmt: skip
