"""K LoRA adapters of different ranks on one frozen base model. Needs torch and Transformers only."""

from rankrace.bank.allocate import allocate
from rankrace.bank.attach import Bank, Candidates
from rankrace.bank.carry import carried
from rankrace.bank.export import Adapter, adapter_of, lora_config, save_adapter
from rankrace.bank.spectrum import Spectrum, spectrum

__all__ = [
    "Adapter", "Bank", "Candidates", "Spectrum", "adapter_of", "allocate", "carried", "lora_config", "save_adapter",
    "spectrum",
]  # fmt: skip
