#!/usr/bin/env bash
# All that is measured on an accelerator, in one call of at most nine minutes, on a machine without network:
#
#   bash benchmarks/device.sh --pack CIFAR10_FOLDER       beforehand, where there is a network: fills benchmarks/carried (ignored by git)
#   bash benchmarks/device.sh --device cuda --out FOLDER  there: a JSON file for each part as it ends, and one table at the end
#   bash benchmarks/device.sh --device cpu --quick        anywhere: small and few, to see that it runs
set -euo pipefail
cd "$(dirname "$0")/.."
exec "${PYTHON:-python3}" benchmarks/device/run.py "$@"
