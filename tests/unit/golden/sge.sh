#!/usr/bin/env bash

#$ -N nrrn
#$ -q gpu
#$ -P lab
#$ -l mem_free=3815M,gpu=1
#$ -l h_rt=2:00:00
#$ -e HERE/nrrn-logs/
#$ -o HERE/nrrn-logs/
#$ -cwd
#$ -j y
#$ -S /bin/bash
#$ -r n
#$ -notify
#$ -pe smp 4
#$ --one-more=1
export NRRN_GRACE_S=20
export DASK_DISTRIBUTED__COMM__REQUIRE_ENCRYPTION=true
export DASK_DISTRIBUTED__WORKER__PROFILE__ENABLED=false
export OMP_NUM_THREADS=4
export MALLOC_ARENA_MAX=1
export MALLOC_MMAP_THRESHOLD_=33554432
export MALLOC_TRIM_THRESHOLD_=268435456
export GLIBC_TUNABLES=glibc.malloc.hugetlb=1
export NRRN_STOP_AT=$(($(date +%s) + 6900))
export NRRN_STOP_WITHIN_S=270
module load cuda
source /opt/nrrn/activate
exec /opt/nrrn/bin/python -m distributed.cli.dask_worker tls://127.0.0.1:PORT --name nrrn-NUMBER --nthreads 2 --memory-limit 0.0B --no-nanny --death-timeout 60 --dashboard-address 127.0.0.1:0 --preload nrrn_pipeline.cluster.worker --resources GPU=1 --interface lo --protocol tls:// --tls-ca-file HERE/nrrn-logs/.nrrn-keys-RANDOM/ca.pem --tls-cert HERE/nrrn-logs/.nrrn-keys-RANDOM/cert.pem --tls-key HERE/nrrn-logs/.nrrn-keys-RANDOM/key.pem
