"""The imports that take every process of a test seconds; the server of tests/support/processes.py has them done."""

import gc

import pytest  # noqa: F401
import transformers.models.llama.modeling_llama  # noqa: F401

import megalign.__main__
import megalign.engines.megatron.engine
import megalign.train.loop  # noqa: F401

gc.collect()
gc.freeze()  # every save collects garbage, and what is imported never is
