"""Imported by the server from which runs are forked: brings in, once, what the models need."""

import torch
from transformers import AutoModelForCausalLM, AutoModelForTokenClassification, AutoTokenizer

from tessy_hf import demo

torch.set_num_threads(1)  # no threads that a fork would miss
for _path in (demo.STUDENT, demo.TEACHER):
    AutoTokenizer.from_pretrained(_path)
    AutoModelForCausalLM.from_pretrained(_path)
for _path in (demo.BOUNDARY_STUDENT, demo.BOUNDARY_TEACHER):
    AutoModelForTokenClassification.from_pretrained(_path)
