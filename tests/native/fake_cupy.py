"""As much of cupy as `native.overlap.host` uses, on the stand-ins of fake_gpu.cc."""

import contextlib
import ctypes
import sys
import threading
import types


def install(fake: ctypes.CDLL) -> None:
    """Puts the module `cupy` in place."""
    pointer = ctypes.c_void_p
    size = ctypes.c_size_t
    integer = ctypes.c_int
    fake.cuCtxPushCurrent_v2.argtypes = fake.cuStreamQuery.argtypes = [pointer]
    fake.ncclCommDestroy.argtypes = fake.ncclCommAbort.argtypes = [pointer]
    reduce = [pointer, pointer, size, integer, integer, pointer, pointer]
    fake.ncclAllReduce.argtypes = fake.ncclReduceScatter.argtypes = reduce
    fake.ncclSend.argtypes = fake.ncclRecv.argtypes = [
        pointer, size, integer, integer, pointer, pointer
    ]  # fmt: skip

    @contextlib.contextmanager
    def device(ordinal):
        fake.cuCtxPushCurrent_v2(ordinal + 1)
        yield
        fake.cuCtxPopCurrent_v2(None)

    class Stream:
        def __init__(self, non_blocking, priority):
            made = pointer()
            fake.cuStreamCreateWithPriority(ctypes.byref(made), int(non_blocking), priority)
            self.ptr = made.value

        @property
        def done(self):
            return fake.cuStreamQuery(self.ptr) == 0

    class Id(ctypes.Structure):
        _fields_ = (("bytes", ctypes.c_char * 128),)

    def checked(result):
        if result:
            raise RuntimeError(f"NCCL error {result}")  # cupy's NcclError is one too

    class NcclCommunicator:
        def __init__(self, comm):
            self.comm = comm

        @staticmethod
        def initAll(devices):
            shared, made = Id(), [pointer() for _ in devices]
            fake.ncclGetUniqueId(ctypes.byref(shared))
            config = (integer * 12)()

            def make(rank):
                fake.ncclCommInitRankConfig(
                    ctypes.byref(made[rank]), len(devices), shared, rank, config
                )

            threads = [threading.Thread(target=make, args=[rank]) for rank in range(len(devices))]
            for thread in threads:
                thread.start()
            for thread in threads:
                thread.join()
            return [NcclCommunicator(comm.value) for comm in made]

        def allReduce(self, *arguments):
            checked(fake.ncclAllReduce(*arguments[:-1], self.comm, arguments[-1]))

        def reduceScatter(self, *arguments):
            checked(fake.ncclReduceScatter(*arguments[:-1], self.comm, arguments[-1]))

        def send(self, *arguments):
            checked(fake.ncclSend(*arguments[:-1], self.comm, arguments[-1]))

        def recv(self, *arguments):
            checked(fake.ncclRecv(*arguments[:-1], self.comm, arguments[-1]))

        def destroy(self):
            fake.ncclCommDestroy(self.comm)

        def abort(self):
            fake.ncclCommAbort(self.comm)

    fake.cuMemsetD8Async.argtypes = [ctypes.c_uint64, ctypes.c_ubyte, size, pointer]
    cupy, cuda, nccl = (types.ModuleType(n) for n in ("cupy", "cupy.cuda", "cupy.cuda.nccl"))
    nccl.NcclCommunicator = NcclCommunicator
    nccl.groupStart, nccl.groupEnd = fake.ncclGroupStart, fake.ncclGroupEnd
    cuda.Device, cuda.Stream, cuda.nccl = device, Stream, nccl
    cuda.runtime = types.SimpleNamespace(memsetAsync=fake.cuMemsetD8Async)
    cupy.cuda = cuda
    sys.modules.update({"cupy": cupy, "cupy.cuda": cuda, "cupy.cuda.nccl": nccl})
