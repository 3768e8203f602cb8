"""The peer of bench_gpu: flash-linear-attention's simple GLA, which has our decay and no scale."""

import importlib.metadata
import pathlib
import sys
from collections.abc import Callable

import numpy as np

_MILLISECONDS = 200


class Peer:
    """fla from a folder of unpacked wheels, or from several such folders in one folder."""

    def __init__(self, folder: pathlib.Path):
        places = [p for p in (folder, *sorted(folder.iterdir())) if (p / "fla").is_dir()]
        if not places:
            sys.exit(f"--peer {folder}: no folder 'fla' in it; unpack the wheels there")
        sys.path[:0] = [str(place.resolve()) for place in places]
        import torch
        from fla.ops.simple_gla import chunk_simple_gla, fused_recurrent_simple_gla

        self._torch, self._chunk, self._token = torch, chunk_simple_gla, fused_recurrent_simple_gla
        self.versions = {name: _version(name) for name in ("fla-core", "torch", "triton")}

    def timer(self, line, inputs) -> Callable[[], float]:
        """A function that returns the milliseconds of one run, warm, on the very same arrays."""
        step = self._step(line, inputs)
        self._check(line, inputs, step)
        if line.mode == "decode":
            step = self._graph(step)
        count = max(3, int(_MILLISECONDS / max(self._milliseconds(step, 3), 1e-3)))
        return lambda: self._milliseconds(step, count)

    def _step(self, line, inputs):
        torch = self._torch
        q, k, v, dout, decay, state = (torch.from_dlpack(x) for x in inputs[:6])
        options = dict(g_gamma=decay, scale=1.0, initial_state=state, output_final_state=True)
        if inputs.bounds is not None:
            options["cu_seqlens"] = torch.from_numpy(inputs.bounds.astype(np.int64)).to(q.device)
            # One state a sequence here; ours starts all but the first from zero.
            later = torch.zeros_like(state).repeat(len(inputs.bounds) - 2, 1, 1, 1)
            options["initial_state"] = torch.cat([state, later])
        if line.mode == "decode":
            return lambda: self._token(q, k, v, **options)
        if line.mode != "forward+backward":
            return lambda: self._chunk(q, k, v, **options)
        q, k, v = (x.detach().requires_grad_() for x in (q, k, v))
        dstate = state.clone()
        options["initial_state"] = state.detach().requires_grad_()
        leaves = (q, k, v, options["initial_state"])

        def both():
            results = self._chunk(q, k, v, **options)
            return *results, *torch.autograd.grad(results, leaves, (dout, dstate))

        return both

    def _check(self, line, inputs, step):
        """The peer must compute what we compute, or the comparison means nothing."""
        from scripts import bench_gpu_checks as checks
        from scripts import bench_gpu_ours as ours

        found = step()  # compiles, and tunes, in any mode
        if line.mode in ("forward", "packed"):
            attend = lambda inputs: ours.attend(inputs, inputs.state, ours.IMPLEMENTATION)[0]
            out = ours.jitted(attend, inputs.bounds)(tuple(inputs[:6]))
            sample = slice(None, None, max(1, line.length // 4096))
            theirs = found[0][:, sample].detach().float().cpu().numpy()
            # Its states between chunks are bfloat16: it may be a little further off.
            checks.compare(f"fla {line.name}", theirs, np.asarray(out[:, sample], np.float32), 2e-2)

    def _graph(self, step):
        """Replayed as a CUDA graph: launching from Python takes longer than a token."""
        torch = self._torch
        stream = torch.cuda.Stream()
        with torch.cuda.stream(stream):
            for _ in range(3):
                step()
        torch.cuda.synchronize()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            step()
        return graph.replay

    def _milliseconds(self, step, count: int) -> float:
        cuda = self._torch.cuda
        begin, end = (cuda.Event(enable_timing=True) for _ in range(2))
        step()
        begin.record()
        for _ in range(count):
            step()
        end.record()
        cuda.synchronize()
        return begin.elapsed_time(end) / count


def _version(name: str) -> str | None:
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return None
