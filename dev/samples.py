import numpy as np, torch, sys
from model import GPT, KeyValueCache
from parts.files import write_json
from parts.data import read_meta
torch.manual_seed(1)
src, name, n = sys.argv[1], sys.argv[2], int(sys.argv[3])
m = GPT.from_pretrained(src).eval()
out = []
with torch.inference_mode():
    for b in range(n):
        ids = torch.zeros(512, 1, dtype=torch.long)
        cache = [KeyValueCache() for _ in m.transformer.h]
        x = ids
        for t in range(256):
            h = m.hidden(x, cache)[:, -1]
            x = torch.multinomial(m.lm_head(h).softmax(-1), 1)
            ids = torch.cat([ids, x], 1)
        out.append(ids[:, :257])
        print(b, flush=True)
import os
os.makedirs(f"data/{name}", exist_ok=True)
a = torch.cat(out).numpy().astype("<u2")
a.tofile(f"data/{name}/train.bin"); a[:8].tofile(f"data/{name}/val.bin")
meta = read_meta("testbed_tune"); meta["train"] = dict(tokens=a.size); meta["val"] = dict(tokens=a[:8].size)
write_json(f"data/{name}/meta.json", meta)
