.PHONY: install test slow lint demo bench ptxas clean

install:          ## into the active environment, with what tests need
	pip install -c constraints-cpu.txt '.[demo,test]'

test:
	pytest

slow:             ## the longer checks
	pytest -m slow

lint:
	ruff check . && ruff format --check .

demo:
	privimage demo --out runs/demo

ptxas:            ## registers and spills of every CUDA kernel
	for f in csrc/cuda/*.cu; do nvcc -std=c++17 -O3 -arch=sm_90 -fmad=false -Xptxas -v -c $$f -o /dev/null 2>&1 | c++filt | grep -E "Function|Used|spill"; done

clean:
	rm -rf build _build* *.egg-info

bench:            ## every benchmark, then the tables and plots of README and docs/measured.md; 20 minutes on two idle cores
	for name in ops dp_step growth; do \
	  pytest benchmarks/test_$$name.py -o addopts= -q --benchmark-json=benchmarks/results/$$name.json \
	    --benchmark-columns=median,iqr,rounds --benchmark-sort=name || exit 1; \
	done
	python benchmarks/table.py
