"""From files to the micro batches of each data-parallel rank."""

from asft_nemo.data.dataset import FILLER, SupervisedDataset
from asft_nemo.data.fingerprint import fingerprint
from asft_nemo.data.inspection import inspect_files
from asft_nemo.data.loading import LoadReport
from asft_nemo.data.ordering import training_order
from asft_nemo.data.packing import PackedDataset
from asft_nemo.data.prepare import Prepared, prepare
from asft_nemo.data.records import Conversation
from asft_nemo.data.sampler import GlobalBatchSampler, Order, SequentialBatchSampler, Shuffled
from asft_nemo.data.sources import BadRow, Record, domain_names, read_records
from asft_nemo.data.templates import PROMPTS, Rendered, render
from asft_nemo.data.tokenization import TextTokenizer, Tokenized

__all__ = [
    "FILLER",
    "PROMPTS",
    "BadRow",
    "Conversation",
    "GlobalBatchSampler",
    "LoadReport",
    "Order",
    "PackedDataset",
    "Prepared",
    "Record",
    "Rendered",
    "SequentialBatchSampler",
    "Shuffled",
    "SupervisedDataset",
    "TextTokenizer",
    "Tokenized",
    "domain_names",
    "fingerprint",
    "inspect_files",
    "prepare",
    "read_records",
    "render",
    "training_order",
]
