#!/usr/bin/env bash
# Front ends that pytest does not start, with what they print. From the top folder, with papermill installed:
#     bash tests/front_ends.sh > tests/results/front_ends.txt
# The code page of Western Windows is imitated by a locale of glibc, which `localedef` makes.
series=$PWD
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
export series folder LOCPATH=$folder TQDM_DISABLE=1 HF_HUB_OFFLINE=1 PYTHONWARNINGS=ignore
localedef -f CP1252 -i en_US "$folder/en_US.CP1252"

run() { # a command, as one types it; the end of what it prints, and its exit status
    echo "\$ $1"
    printed=$(eval "$1" 2>&1)
    status=$?
    echo "$printed" | sed "s|$series|SERIES|g; s|$folder|FOLDER|g; s/\x1b\[[0-9;]*m//g" | tail -n "${2:-1}" | cut -c1-300
    echo "exit status $status"
    echo
}

echo "bash tests/front_ends.sh; $(python -c "
from importlib.metadata import version
print(*(f'{name} {version(name)}' for name in ('nbclient', 'nbconvert', 'papermill', 'torch', 'transformers')), sep=', ')")"
echo "SERIES is the folder of the series, FOLDER an empty one; of each command the last line"
echo
run 'MPLBACKEND=Agg jupyter execute notebooks/02_absmax.ipynb'
run 'LC_ALL=en_US.CP1252 python -c "import locale; print(locale.getpreferredencoding())"'
run 'LC_ALL=en_US.CP1252 jupyter nbconvert --to notebook --execute --output-dir $folder notebooks/02_absmax.ipynb'
run 'LC_ALL=en_US.CP1252 jupyter execute notebooks/02_absmax.ipynb'
run 'PYTHONUTF8=1 LC_ALL=en_US.CP1252 jupyter execute notebooks/02_absmax.ipynb'
run 'python tests/odd_models.py $folder none --models llama'
run 'papermill --no-progress-bar --cwd notebooks -p MODEL $folder/llama notebooks/21_your_own_model.ipynb $folder/21.ipynb'
run 'jupyter nbconvert --to script --stdout $folder/21.ipynb 2> /dev/null | grep "^MODEL = "' 2
run 'grep -o "torch 2[^,]*, transformers [^,]*, cpu, [^\\]*" $folder/21.ipynb'
run 'cd $folder && jupyter execute $series/notebooks/02_absmax.ipynb'
run 'cd $folder && papermill --no-progress-bar $series/notebooks/02_absmax.ipynb 02.ipynb'
