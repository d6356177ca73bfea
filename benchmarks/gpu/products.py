"""The floor: the matrix products that a path cannot do without, through torch.mm on outputs that exist already.

    products-whole    all rows in one product: the fastest there is, at the price of all logits in memory
    products-chunks   in chunks of as many rows as our tiles have, dW overwritten by every chunk
    products-float32  the same chunks with our numerics: float32 logits, dz in the memory of a float32 tile, dW summed in float32
                      and cast at the end; what is left between it and ours are the row kernels
"""

import torch

from .context import Absent

WHOLE, CHUNKS, FLOAT32 = "products-whole", "products-chunks", "products-float32"
NAMES, FLOORS = (WHOLE, CHUNKS, FLOAT32), (WHOLE, CHUNKS)


def make(name, p, tile_rows):
    """A call without arguments that runs the products of problem ``p``."""
    path = p.workload
    kept = p.mask.flatten().nonzero().squeeze(1)
    trained = (p.advantages != 0).unsqueeze(1).expand_as(p.mask).flatten()[kept]
    if p.config.beta:
        trained = torch.ones_like(trained)
    rows = p.hidden.flatten(0, 1)[torch.cat([kept[trained], kept[~trained]])]
    live = int(trained.sum()) if path.gradients else 0
    step = rows.shape[0] if name == WHOLE else min(tile_rows, rows.shape[0])
    if name == CHUNKS and step == rows.shape[0]:
        raise Absent("one tile holds all rows")
    dh = torch.empty_like(rows)
    if name == FLOAT32:
        return _float32(p, rows, live, step, dh)
    z, dw = rows.new_empty(step, p.shape.vocab), torch.empty_like(p.weight)

    def run():
        for start in range(0, rows.shape[0], step):
            h = rows[start : start + step]
            tile = torch.mm(h, p.weight.T, out=z[: h.shape[0]])
            n = min(max(live - start, 0), h.shape[0])
            if n:
                if path.recompute:
                    torch.mm(h[:n], p.weight.T, out=tile[:n])
                torch.mm(tile[:n], p.weight, out=dh[start : start + n])
                if path.trains_head:
                    torch.mm(tile[:n].T, h[:n], out=dw)

    return run


def _float32(p, rows, live, step, dh):
    if not rows.is_cuda:
        raise Absent("a product on the CPU cannot write float32")
    path, vocab = p.workload, p.shape.vocab
    z = torch.empty(step, vocab, device=rows.device)
    # ordinary numbers: what lies in a float32 tile, read as bf16, is none, and a product of zeros or NaN takes another time
    dz = torch.randn(step, 2 * vocab, device=rows.device, dtype=rows.dtype)[:, :vocab]
    dw = torch.empty(p.weight.shape, device=rows.device)
    final = torch.empty_like(p.weight)

    def run():
        for start in range(0, rows.shape[0], step):
            h = rows[start : start + step]
            tile = torch.mm(h, p.weight.T, out_dtype=torch.float32, out=z[: h.shape[0]])
            n = min(max(live - start, 0), h.shape[0])
            if n:
                if path.recompute:
                    torch.mm(h[:n], p.weight.T, out_dtype=torch.float32, out=tile[:n])
                torch.mm(dz[:n], p.weight, out=dh[start : start + n])
                if path.trains_head and start == 0:
                    torch.mm(dz[:n].T, h[:n], out_dtype=torch.float32, out=dw)
                elif path.trains_head:
                    torch.addmm(dw, dz[:n].T, h[:n], out_dtype=torch.float32, out=dw)
        if live and path.trains_head:
            final.copy_(dw)

    return run
