"""CrossGET: cross-guided ensemble of tokens for vision and vision-language transformers.

`with crossget.attach(model, crossget.CrossGET(r=16)) as attached:` reduces a model, in place, until the end.
"""

from crossget.attach import Attachment, attach, attachment
from crossget.benchmark import benchmark
from crossget.budget import Fit, fit
from crossget.checkpoint import load
from crossget.doctor import doctor
from crossget.ensemble import unmerge
from crossget.flops import count_flops
from crossget.reducers import CrossGET, Merging, Random, Reducer, ToMe, TopK, Ward
from crossget.reference import load_reference
from crossget.registry import Features, Prompt, Reader, Readout, TextInput, Tower, find_towers, register, unregister
from crossget.schedule import Constant, Linear, PerLayer, Ratio, Rising, Schedule
from crossget.training import parameter_groups

__version__ = "0.1.0"

__all__ = [
    "Attachment",
    "Constant",
    "CrossGET",
    "Features",
    "Fit",
    "Linear",
    "Merging",
    "PerLayer",
    "Prompt",
    "Random",
    "Ratio",
    "Reader",
    "Readout",
    "Reducer",
    "Rising",
    "Schedule",
    "TextInput",
    "ToMe",
    "TopK",
    "Tower",
    "Ward",
    "attach",
    "attachment",
    "benchmark",
    "count_flops",
    "doctor",
    "find_towers",
    "fit",
    "load",
    "load_reference",
    "parameter_groups",
    "register",
    "unmerge",
    "unregister",
]
