"""Runs the PTX of a Triton kernel on the CPU: what the compiler made of it, not what it was told.

The interpreter checks the Python of a kernel, in fp32 alone. This checks the code that a GPU gets:
bf16, layouts, shuffles between lanes, the order of bytes in stores, accesses past the end of a
tensor. All threads of a block go through the instructions together, so barriers are free and a
branch must go the same way in all. It knows the instructions that the kernels of a token use and
that of error feedback.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence

import numpy as np

Bits = np.ndarray  # one unsigned integer (or bool) a thread
_WIDTHS = {"8": np.uint8, "16": np.uint16, "32": np.uint32, "64": np.uint64}
_INSTRUCTION = re.compile(r"\s*(?:@(!?)(%p\d+)\s+)?([a-z][\w.]*)\s*([^;]*);")
_OPERAND = re.compile(r"\{[^}]*\}|\[[^\]]*\]|[^,\s]+")


def _f32(bits: Bits) -> np.ndarray:
    return bits.astype(np.uint32).view(np.float32)


def _bits(values: np.ndarray) -> Bits:
    return np.asarray(values, dtype=np.float32).view(np.uint32)


def _signed(bits: Bits) -> np.ndarray:
    return bits.view({4: np.int32, 8: np.int64}[bits.itemsize])


def _bf16(values: np.ndarray) -> Bits:
    """To nearest, half to even; NaN stays NaN."""
    bits = _bits(values)
    rounded = (bits + 0x7FFF + ((bits >> 16) & 1)) >> 16
    return np.where(np.isnan(values), 0x7FFF, rounded).astype(np.uint32)


def _permute_bytes(a: Bits, b: Bits, selector: Bits) -> Bits:
    both = a.astype(np.uint64) | (b.astype(np.uint64) << np.uint64(32))
    result = np.zeros_like(a)
    for i in range(4):
        nibble = (selector >> np.uint32(4 * i)) & np.uint32(15)
        if (nibble & 8).any():
            raise NotImplementedError("prmt that replicates a sign")
        byte = (both >> (nibble.astype(np.uint64) * np.uint64(8))) & np.uint64(255)
        result |= byte.astype(np.uint32) << np.uint32(8 * i)
    return result


_FLOAT: dict[str, Callable[..., np.ndarray]] = {
    "add": np.add,
    "sub": np.subtract,
    "mul": np.multiply,
    "div": np.divide,
    "max": np.maximum,  # propagates NaN, as max.NaN
    "min": np.minimum,
    "abs": np.abs,
    "neg": np.negative,
    "sqrt": np.sqrt,
    "rsqrt": lambda x: (1 / np.sqrt(x.astype(np.float64))).astype(np.float32),
    "ex2": np.exp2,
    # The product is exact in float64: rounded twice, which matters once in 2^29.
    "fma": lambda a, b, c: (a.astype(np.float64) * b + c).astype(np.float32),
}
_COMPARE = {
    "eq": np.equal,
    "ne": np.not_equal,
    "lt": np.less,
    "le": np.less_equal,
    "gt": np.greater,
    "ge": np.greater_equal,
}


class Kernel:
    """The one entry of a PTX module."""

    def __init__(self, ptx: str, num_threads: int) -> None:
        self.num_threads = num_threads
        body = ptx[ptx.index(".entry") :]
        self._parameters = re.findall(r"\.param \.(\w+)[^,)]*? (\w+)\s*[,)\n]", body)
        self._code: list[tuple[str, str, str, list[str]]] = []
        self._labels: dict[str, int] = {}
        for line in body[body.index("{") :].splitlines():
            line = line.split("//")[0]
            if label := re.match(r"(\$\w+):", line):
                self._labels[label[1]] = len(self._code)
            elif found := _INSTRUCTION.match(line):
                if found[3].startswith(("reg", "loc")):
                    continue
                self._code.append((found[1], found[2], found[3], _OPERAND.findall(found[4])))

    def __call__(self, program: int, arguments: Sequence[np.ndarray | int | float]) -> None:
        """One program; arrays are written in place."""
        _Run(self, program, arguments).run()


class _Run:
    def __init__(self, kernel: Kernel, program: int, arguments: Sequence) -> None:
        self._kernel, self._threads = kernel, kernel.num_threads
        self._memory = {0: np.zeros(1 << 16, np.uint8)}  # shared memory begins at address 0
        self._registers: dict[str, Bits] = {
            "%tid.x": np.arange(self._threads, dtype=np.uint32),
            "%ctaid.x": np.full(self._threads, program, np.uint32),
            "global_smem": np.zeros(self._threads, np.uint64),
        }
        self._values: dict[str, int] = {}
        # Triton passes two pointers of its own after the arguments.
        for index, (kind, name) in enumerate(kernel._parameters):
            value = arguments[index] if index < len(arguments) else 0
            if isinstance(value, np.ndarray):
                self._memory[index + 1] = value.reshape(-1).view(np.uint8)
                self._values[name] = (index + 1) << 32
            elif kind == "f32":
                self._values[name] = int(np.float32(value).view(np.uint32))
            else:
                self._values[name] = int(value)

    def run(self) -> None:
        position, code = 0, self._kernel._code
        with np.errstate(all="ignore"):
            while position < len(code):
                inverted, predicate, opcode, operands = code[position]
                active = np.ones(self._threads, bool)
                if predicate:
                    active = self._registers[predicate] ^ bool(inverted)
                position += 1
                if opcode.startswith("bra"):
                    if active.any() != active.all():
                        raise NotImplementedError("a branch on which threads part")
                    if active.all():
                        position = self._kernel._labels[operands[0]]
                elif opcode == "ret":
                    return
                elif not opcode.startswith("bar."):
                    self._execute(opcode.split("."), operands, active)

    # ---- operands

    def _get(self, operand: str, width: str = "32") -> Bits:
        kind = np.bool_ if width == "pred" else _WIDTHS[width]
        if operand in self._registers:
            return self._registers[operand].astype(kind)
        if operand.startswith("%"):  # never written: LLVM leaves such halves of words around
            return np.full(self._threads, 0x7FC17FC1 & (2 ** int(width) - 1), dtype=kind)
        if operand.startswith("0f"):
            number = int(operand[2:], 16)
        else:
            number = int(operand.rstrip("U"), 0)
            number = number != 0 if width == "pred" else number & (2 ** int(width) - 1)
        return np.full(self._threads, number, dtype=kind)

    def _set(self, operand: str, value: Bits, active: np.ndarray) -> None:
        if not active.all():
            value = np.where(active, value, self._registers.get(operand, np.zeros_like(value)))
        self._registers[operand] = value

    def _address(self, operand: str) -> np.ndarray:
        base, _, offset = operand.strip("[] ").partition("+")
        register = self._registers[base.strip()].astype(np.uint64)
        return register + np.uint64(int(offset.strip() or "0", 0))

    # ---- instructions

    def _execute(self, opcode: list[str], operands: list[str], active: np.ndarray) -> None:
        name, width = opcode[0], re.sub(r"\D", "", opcode[-1]) or "pred"
        if name in ("ld", "st"):
            self._move(opcode, operands, active)
        elif name == "mov" and "{" in operands[0]:
            word, half = self._get(operands[1], width), str(int(width) // 2)
            for index, register in enumerate(_OPERAND.findall(operands[0].strip("{}"))):
                part = word >> word.dtype.type(int(half) * index)
                self._set(register, part.astype(_WIDTHS[half]), active)
        elif name == "mov" and "{" in operands[1]:
            kind, half = _WIDTHS[width], str(int(width) // 2)
            parts = [self._get(r, half) for r in _OPERAND.findall(operands[1].strip("{}"))]
            low, high = (part.astype(kind) for part in parts)
            self._set(operands[0], low | (high << kind(int(half))), active)
        elif name == "setp":
            of_type = opcode[-1]
            a, b = (self._get(o, width) for o in operands[1:])
            if of_type.startswith("s"):
                a, b = _signed(a), _signed(b)
            elif of_type.startswith("f"):
                a, b = _f32(a), _f32(b)
            self._set(operands[0], _COMPARE[opcode[1]](a, b), active)
        else:
            self._set(operands[0], self._result(opcode, operands[1:], width), active)

    def _result(self, opcode: list[str], operands: list[str], width: str) -> Bits:
        name, of_type = opcode[0], opcode[-1]
        if name == "shfl":
            return self._shuffle(opcode, operands)
        if name == "redux":
            lanes = _signed(self._get(operands[0])).reshape(-1, 32)
            of_warp = {"max": lanes.max, "add": lanes.sum}[opcode[2]](1)
            return np.repeat(of_warp.astype(np.int32), 32).view(np.uint32)
        if name == "cvt":
            return self._convert(opcode, operands)
        if name == "selp":
            return np.where(
                self._get(operands[2], "pred"), *(self._get(o, width) for o in operands[:2])
            )
        if of_type == "f32":
            return _bits(_FLOAT[name](*(_f32(self._get(o)) for o in operands)))
        if name in ("mad", "mul") and "wide" in opcode:
            a, b = (self._get(o) for o in operands[:2])
            wide = np.int64 if of_type == "s32" else np.uint64
            product = (_signed(a) if of_type == "s32" else a).astype(wide)
            product = product * (_signed(b) if of_type == "s32" else b).astype(wide)
            added = self._get(operands[2], "64") if name == "mad" else np.uint64(0)
            return product.astype(np.uint64) + added
        values = [self._get(o, width) for o in operands]
        return self._integer(name, of_type, values)

    @staticmethod
    def _integer(name: str, of_type: str, v: list[Bits]) -> Bits:
        if name == "mov":
            return v[0]
        if name in ("bfe", "bfi"):  # a field of a word, or a word with another field
            one = v[0].dtype.type(1)
            field = (one << v[-1]) - one
            if name == "bfe":
                taken = (v[0] >> v[1]) & field
                sign = (field >> one) + one  # the field's upper bit, which bfe.s32 extends
                return (taken ^ sign) - sign if of_type == "s32" else taken
            return (v[1] & ~(field << v[2])) | ((v[0] & field) << v[2])
        if name == "prmt":
            return _permute_bytes(*v)
        if name == "popc":
            return np.array([int(word).bit_count() for word in v[0]], np.uint32)
        if name in ("and", "or", "xor", "not"):
            return getattr(np, {"not": "logical_not"}.get(name, f"bitwise_{name}"))(*v)
        if of_type.startswith("s") and name in ("max", "min", "div", "shr"):
            a, b = _signed(v[0]), _signed(v[1])
            if name == "div":
                result = np.trunc(a / b).astype(a.dtype)
            else:
                result = {"max": np.maximum, "min": np.minimum, "shr": np.right_shift}[name](a, b)
            return result.view(v[0].dtype)
        simple = {"add": np.add, "sub": np.subtract, "mul": np.multiply}
        simple |= {"shl": np.left_shift, "shr": np.right_shift}
        if name == "mad":
            return v[0] * v[1] + v[2]
        return simple[name](*v)

    def _shuffle(self, opcode: list[str], operands: list[str]) -> Bits:
        value, by = self._get(operands[0]), self._get(operands[1])
        lane = np.arange(self._threads, dtype=np.uint32)
        if "bfly" in opcode:
            source = lane ^ by
        elif "idx" in opcode:
            source = (lane & ~np.uint32(31)) | (by & np.uint32(31))
        else:
            raise NotImplementedError(".".join(opcode))
        return value[source]

    def _convert(self, opcode: list[str], operands: list[str]) -> Bits:
        kind = ".".join(opcode[1:])
        if kind == "f32.bf16":
            return self._get(operands[0], "16").astype(np.uint32) << np.uint32(16)
        if kind == "f32.f16":
            half = self._get(operands[0], "16").view(np.float16)
            return _bits(half.astype(np.float32))
        if kind in ("rn.f16.f32", "rn.f16x2.f32"):
            halves = [_f32(self._get(o)).astype(np.float16).view(np.uint16) for o in operands]
            if len(halves) == 1:
                return halves[0]
            return (halves[0].astype(np.uint32) << np.uint32(16)) | halves[1]
        if kind == "rn.bf16x2.f32":  # the first operand becomes the upper half
            upper, lower = (_bf16(_f32(self._get(o))) for o in operands)
            return (upper << np.uint32(16)) | lower
        if kind == "rn.bf16.f32":
            return _bf16(_f32(self._get(operands[0]))).astype(np.uint16)
        if kind in ("u32.u64", "u16.u32", "u32.u16", "u16.u64"):
            source = self._get(operands[0], opcode[2][1:])
            return source.astype(_WIDTHS[opcode[1][1:]])
        if kind == "u64.u32":
            return self._get(operands[0]).astype(np.uint64)
        if kind == "s64.s32":
            return _signed(self._get(operands[0])).astype(np.int64).view(np.uint64)
        raise NotImplementedError(f"cvt.{kind}")

    def _move(self, opcode: list[str], operands: list[str], active: np.ndarray) -> None:
        loads, space = opcode[0] == "ld", opcode[1]
        if space == "param":
            value = self._kernel_value(operands[1].strip("[]"), opcode[2])
            self._set(operands[0], value, active)
            return
        kind = _WIDTHS[re.sub(r"\D", "", opcode[-1])]
        size = np.dtype(kind).itemsize
        registers, address = operands if loads else reversed(operands)
        addresses = self._address(address)
        for index, register in enumerate(_OPERAND.findall(registers.strip("{}"))):
            where = addresses + np.uint64(size * index)
            value = np.zeros(self._threads, kind) if loads else self._get(register, str(8 * size))
            buffers, starts = where >> np.uint64(32), where & np.uint64(0xFFFFFFFF)
            for number in np.unique(buffers[active]):
                buffer = self._memory[int(number)]
                threads = np.flatnonzero(active & (buffers == number))
                start = starts[threads].astype(np.int64)
                wrong = (start + size > buffer.size) | (start % size != 0)
                if wrong.any():
                    byte = start[wrong][0]
                    raise IndexError(f"{'.'.join(opcode)}: byte {byte} of {buffer.size}")
                elements = buffer[: buffer.size // size * size].view(kind)
                if loads:
                    value[threads] = elements[start // size]
                else:  # of threads that write to one place the last stays
                    elements[start // size] = value[threads]
            if loads:
                self._set(register, value, active)

    def _kernel_value(self, name: str, kind: str) -> Bits:
        value = self._values[name]
        width = 64 if "64" in kind or kind == "s32" else 32
        return np.full(self._threads, value & (2**width - 1), dtype=_WIDTHS[str(width)])
