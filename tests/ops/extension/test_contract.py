"""Python and C++ agree on the arguments of ``assemble`` and on the orders of enums."""

from __future__ import annotations

import pytest
import torch

from softprompt_fast.ops.extension import backend, contract


def test_a_call_has_the_arguments_of_the_schema(native: backend.Ops) -> None:
    schema = torch.ops.softprompt_fast.assemble.default._schema
    assert contract.AssembleCall._fields == tuple(argument.name for argument in schema.arguments)
    defaults = {argument.name: argument.default_value for argument in schema.arguments if argument.has_default_value()}
    assert contract.AssembleCall._field_defaults == defaults


@pytest.mark.parametrize("name", ["MaskFormat", "Status", "PlanColumn", "TableColumn"])
def test_enums_have_the_orders_of_the_extension(native: backend.Ops, name: str) -> None:
    module = backend.state().module
    assert module is not None
    assert {member.name: member.value for member in getattr(contract, name)} == module.enum_orders()[name]


def test_constants_are_those_of_the_extension(native: backend.Ops) -> None:
    module = backend.state().module
    assert module is not None
    assert module.constants() == {
        "NO_ERROR": contract.NO_ERROR,
        "FEW_INTEGERS": contract.FEW_INTEGERS,
        "STATUS_SIZE": len(contract.Status),
        "PLAN_COLUMNS": len(contract.PlanColumn),
        "TABLE_COLUMNS": len(contract.TableColumn),
    }
