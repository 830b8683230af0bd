"""What the blocks that an owner block joins have of its bases and inverses."""

from __future__ import annotations

from typing import Any

from curvax.kron._block_operators import EigenOperator, FactoredOperator
from curvax.kron._gradient_pairs import Basis
from curvax.kron._kron_factor import Diagonal, Full, Identity, KronFactor
from curvax.kron._layout import Block, Layout
from curvax.kron._operator import KronOperator
from curvax.kron._placement import Member, OwnerBlock


def member_bases(block: OwnerBlock, basis: Basis) -> list[Basis]:
    """Return the eigenbasis of every member, in the order of its own sides.

    Of the eigenvectors of a padded factor the rows are cut that belong to no entry. The columns all
    stay: those of padding become 0, and moments in their direction too.
    """
    bases = []
    for member, of_member in block.split(basis):
        sides = []
        for vectors, size in zip(of_member, member.sides, strict=True):
            sides.append(None if vectors is None else vectors[:, :size])
        first, second = sides
        bases.append(Basis(*member.oriented((first, second))))
    return bases


def for_everyone(layout: Layout, operator: KronOperator) -> tuple[Layout, KronOperator]:
    """Take apart the owner blocks by which every device multiplies all steps.

    Their empty slices and padding, which are there for the inversion alone, are not multiplied by.
    """
    blocks: list[Block] = []
    operators = dict(operator.blocks)
    for block in layout.blocks:
        if not isinstance(block, OwnerBlock) or block.precondition == "owners":
            blocks.append(block)
            continue
        for member, of_member in block.split(operators.pop(block.name)):
            blocks.append(member.block)
            operators[member.block.name] = cut_operator(member, of_member)
    return Layout(tuple(blocks), layout.leaves), operator._replace(blocks=operators)


def cut_operator(member: Member, operator: Any) -> Any:
    """Cut off what padding has added to an operator on the matrices of a block."""
    rows, columns = member.sides
    if isinstance(operator, EigenOperator):
        left, right, scale = operator
        # Eigenvectors of padding are 0 in these rows: they may stay. The basis of a diagonal factor
        # is that of the rows themselves.
        if left is None:
            scale = scale[:, :rows]
        else:
            left = left[:, :rows]
        if right is None:
            scale = scale[:, :, :columns]
        else:
            right = right[:, :columns]
        if member.is_swapped:
            scale = scale.swapaxes(1, 2)
        return EigenOperator(*member.oriented((left, right)), scale)
    first = cut_factor(operator.left, rows)
    second = cut_factor(operator.right, columns)
    return FactoredOperator(*member.oriented((first, second)))


def cut_factor(factor: KronFactor, size: int) -> KronFactor:
    """Cut off what padding has added to an inverse, `blockdiag(F^-1, I / c)`."""
    if isinstance(factor, Full):
        return Full(factor.matrix[:, :size, :size])
    if isinstance(factor, Identity):
        return Identity(factor.scale, size)
    return Diagonal(factor.diagonal()[:, :size])
