"""Vectors of a cache line in numba kernels: 16 float32 or 8 float64 numbers, one for each sentence of a block.

Charts work on several sentences of one length in lockstep, so each of their numbers is such a vector. Numba's own loops over
the lanes would keep the running sums of an inner loop in memory. A vector type keeps them in registers, which is many times
faster. LLVM splits the vectors into what the machine has (two AVX registers, four SSE or NEON ones, one AVX-512 one).

An array of lanes is a C-contiguous array of shape (rows, 16 or 8); `load(array, row)` and `store(array, row, value)` move one
row. All functions are for use in `numba.njit` code only. `pcfg.engine.plain_lanes` has the same functions without vectors.
"""

from typing import Any

from llvmlite import ir
from numba import types
from numba.core import cgutils
from numba.extending import intrinsic, models, register_model

from pcfg.engine.plain_lanes import CHUNK, LANE_BYTES

# The first argument of an intrinsic, numba's typing context, is none of a caller's, so mypy must not count it.
kernel: Any = intrinsic


class LanesType(types.Type):
    """The numba type of a vector of float32 or float64."""

    def __init__(self, dtype: types.Float):
        self.dtype = dtype
        self.count = 8 * LANE_BYTES // dtype.bitwidth
        super().__init__(name=f"Lanes({dtype})")


@register_model(LanesType)
class _LanesModel(models.PrimitiveModel):
    def __init__(self, manager, lanes_type):
        scalar = ir.FloatType() if lanes_type.dtype == types.float32 else ir.DoubleType()
        super().__init__(manager, lanes_type, ir.VectorType(scalar, lanes_type.count))


def _row(context, builder, array_type, array, row):
    """Pointer to a row of an array, as a vector, and the alignment that numpy guarantees."""
    vector = context.get_value_type(LanesType(array_type.dtype))
    start = builder.mul(row, row.type(vector.count))
    data = context.make_array(array_type)(context, builder, array).data
    return builder.bitcast(builder.gep(data, [start]), vector.as_pointer()), array_type.dtype.bitwidth // 8


@kernel
def load(_, array, row):  # noqa: ARG001 (numba's protocol)
    """Row `row` of an array of lanes."""
    signature = LanesType(array.dtype)(array, types.intp)

    def generate(context, builder, signature, arguments):
        pointer, alignment = _row(context, builder, signature.args[0], *arguments)
        value = builder.load(pointer)
        value.align = alignment
        return value

    return signature, generate


@kernel
def store(_, array, row, value):  # noqa: ARG001 (numba's protocol)
    """Make `value` the row `row` of an array of lanes."""
    signature = types.void(array, types.intp, value)

    def generate(context, builder, signature, arguments):
        pointer, alignment = _row(context, builder, signature.args[0], *arguments[:2])
        builder.store(arguments[2], pointer).align = alignment

    return signature, generate


@kernel
def splat(_, scalar):
    """A vector of `scalar` (float32 or float64) in all lanes."""

    def generate(context, builder, signature, arguments):
        vector = context.get_value_type(signature.return_type)
        undefined = ir.Constant(vector, ir.Undefined)
        index = ir.IntType(32)
        first = builder.insert_element(undefined, arguments[0], index(0))
        return builder.shuffle_vector(first, undefined, ir.Constant(ir.VectorType(index, vector.count), None))

    return LanesType(scalar)(scalar), generate


def _fused(builder, *vectors):
    vector = vectors[0].type
    kind = "f32" if isinstance(vector.element, ir.FloatType) else "f64"
    function_type = ir.FunctionType(vector, [vector] * 3)
    function = cgutils.get_or_insert_function(builder.module, function_type, f"llvm.fmuladd.v{vector.count}{kind}")
    return builder.call(function, vectors)


@kernel
def multiply_add(_, first, second, third):
    """first * second + third, fused where the machine can."""
    return first(first, second, third), lambda _context, builder, _signature, vectors: _fused(builder, *vectors)


@kernel
def multiply(_, first, second):
    """first * second."""
    return first(first, second), lambda _context, builder, _signature, vectors: builder.fmul(*vectors)


@kernel
def divide(_, first, second):
    """first / second."""
    return first(first, second), lambda _context, builder, _signature, vectors: builder.fdiv(*vectors)


@kernel
def maximum(_, first, second):
    """The larger of the two, lane by lane."""

    def generate(_context, builder, _signature, vectors):
        return builder.select(builder.fcmp_ordered(">", *vectors), *vectors)

    return first(first, second), generate


# R(z) = coefficients[0] z + coefficients[1] z^2 + ... with z = s^2, s = f / (2 + f) and log(1 + f) = f - f^2/2 + s (f^2/2 + R);
# log 2 in two parts; exponent offset, bits of the mantissa, bits of about sqrt(1/2). From FreeBSD's e_logf.c and e_log.c.
_LOG = {
    32: (
        (0.66666662693, 0.40000972152, 0.28498786688, 0.24279078841),
        (6.9313812256e-01, 9.0580006145e-06),
        127,
        23,
        0x3F3504F3,
    ),
    64: (
        (
            *(6.666666666666735130e-01, 3.999999999940941908e-01, 2.857142874366239149e-01, 2.222219843214978396e-01),
            *(1.818357216161805012e-01, 1.531383769920937332e-01, 1.479819860511658591e-01),
        ),
        (6.93147180369123816490e-01, 1.90821492927058770002e-10),
        1023,
        52,
        0x3FE6A09E00000000,
    ),
}


@kernel
def log(_, value):
    """Natural logarithm of positive, normal numbers, to one unit in the last place; a finite number for 0.

    x = 2^k (1 + f) with 1 + f in [sqrt(1/2), sqrt(2)), log x = k log 2 + log(1 + f). The C library's logarithm would take the
    lanes one by one.
    """

    def generate(context, builder, signature, arguments):
        vector = context.get_value_type(signature.return_type)
        width = signature.return_type.dtype.bitwidth
        coefficients, (high, low), offset, mantissa, root = _LOG[width]
        integers = ir.VectorType(ir.IntType(width), vector.count)

        def real(number):
            return ir.Constant(vector, [number] * vector.count)

        def integer(number):
            return ir.Constant(integers, [number] * vector.count)

        one = offset << mantissa
        bits = builder.add(builder.bitcast(arguments[0], integers), integer(one - root))
        exponent = builder.sub(builder.ashr(bits, integer(mantissa)), integer(offset))
        bits = builder.add(builder.and_(bits, integer((1 << mantissa) - 1)), integer(root))
        f = builder.fsub(builder.bitcast(bits, vector), real(1.0))
        s = builder.fdiv(f, builder.fadd(f, real(2.0)))
        square = builder.fmul(s, s)
        polynomial = real(coefficients[-1])
        for coefficient in coefficients[-2::-1]:
            polynomial = _fused(builder, polynomial, square, real(coefficient))
        half = builder.fmul(real(0.5), builder.fmul(f, f))
        k = builder.sitofp(exponent, vector)
        tail = _fused(builder, s, _fused(builder, polynomial, square, half), builder.fmul(k, real(low)))
        return builder.fadd(builder.fmul(k, real(high)), builder.fadd(builder.fsub(tail, half), f))

    return value(value), generate


@kernel
def move_chunk(_, target, place, source, begin):  # noqa: ARG001 (numba's protocol)
    """target[place : place + CHUNK] = source[begin : begin + CHUNK] for arrays of bytes, as one load and one store."""

    def generate(context, builder, signature, arguments):
        chunk = ir.VectorType(ir.IntType(8), CHUNK).as_pointer()

        def pointer(array, offset):
            data = context.make_array(signature.args[array])(context, builder, arguments[array]).data
            return builder.bitcast(builder.gep(data, [arguments[offset]]), chunk)

        value = builder.load(pointer(2, 3), align=1)
        builder.store(value, pointer(0, 1), align=1)

    return types.void(target, types.intp, source, types.intp), generate
