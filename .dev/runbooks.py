"""python .dev/cuda.py [JOBS] NAMES...: run notebooks cell by cell in IPython, no kernel; one line each."""
import json,os,subprocess,sys,time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
NB=Path(__file__).resolve().parents[1]/"notebooks"
def one(path):
    from IPython.core.interactiveshell import InteractiveShell
    from traitlets.config import Config
    import matplotlib; matplotlib.use("Agg")
    shell=InteractiveShell.instance(config=Config(HistoryManager={"enabled":False})); path=Path(path).resolve(); os.chdir(path.parent)
    for c in json.loads(Path(path).read_text())["cells"]:
        if c["cell_type"]!="code": continue
        r=shell.run_cell("".join(c["source"]))
        if not r.success: print("\nFAILED CELL",c["id"],repr(r.error_in_exec or r.error_before_exec)[:400]); sys.exit(1)
def run(path):
    t=time.time(); p=subprocess.run([sys.executable,__file__,"--one",str(path)],capture_output=True,text=True)
    tail=(p.stdout+p.stderr).strip().splitlines()[-3:] if p.returncode else [""]
    out=os.environ.get("OUT")
    if out: Path(out,path.stem+".txt").write_text(p.stdout[-15000:]) if False else None
    print(f"{path.stem}: {'ok' if p.returncode==0 else 'FAIL'} {time.time()-t:.0f} s {' | '.join(tail)[:600]}",flush=True)
    return p.stdout
if sys.argv[1]=="--one": one(sys.argv[2]); sys.exit()
jobs=int(sys.argv[1]); paths=[p for n in sys.argv[2:] for p in sorted(NB.glob(n+"*.ipynb"))] or sorted(NB.glob("[0-9]*.ipynb"))
with ThreadPoolExecutor(jobs) as ex: outs=list(ex.map(run,paths))
if os.environ.get("OUT"): Path(os.environ["OUT"],"all.txt").write_text("\n\n#####\n".join(p.stem+"\n"+o for p,o in zip(paths,outs)))
