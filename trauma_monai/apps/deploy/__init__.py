"""Both bundles on MONAI Deploy: DICOM in, DICOM SEG or SR out. Runs in the environment of scripts/deploy_env.sh."""
