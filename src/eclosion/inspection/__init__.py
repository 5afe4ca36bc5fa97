"""Looking without training: at a config, at data, at runs and at the parts there are."""

from eclosion.inspection.checking import Check, check
from eclosion.inspection.data_sheet import show_data
from eclosion.inspection.parts import PartInfo, list_parts
from eclosion.inspection.recipes import recipes, write_config
from eclosion.inspection.runs import RunInfo, list_runs

__all__ = ["Check", "PartInfo", "RunInfo", "check", "list_parts", "list_runs", "recipes", "show_data", "write_config"]
