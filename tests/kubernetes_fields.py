"""The fields that the resources of examples/launch may have, with their types, as far as those files go.

Source: kubeflow/training-operator manifests/base/crds/kubeflow.org_pytorchjobs.yaml (1.7 to 1.9), kubeflow/trainer
manifests/base/crds/trainer.kubeflow.org_trainjobs.yaml (2.0), and Kubernetes' PodSpec. A field in none of them is
dropped by a server without a word.
"""

from __future__ import annotations

from typing import Any

QUANTITIES = {str: (str, int)}
RESOURCES = {"limits": QUANTITIES, "requests": QUANTITIES}
CONTAINER = {
    "name": str,
    "image": str,
    "workingDir": str,
    "command": [str],
    "args": [str],
    "env": [{"name": str, "value": str}],
    "resources": RESOURCES,
    "volumeMounts": [{"name": str, "mountPath": str, "subPath": str, "readOnly": bool}],
}
VOLUME = {
    "name": str,
    "persistentVolumeClaim": {"claimName": str, "readOnly": bool},
    "emptyDir": {"medium": str, "sizeLimit": (str, int)},
}
POD = {
    "terminationGracePeriodSeconds": int,
    "containers": [CONTAINER],
    "volumes": [VOLUME],
    "nodeSelector": {str: str},
    "priorityClassName": str,
}
REPLICA = {
    "replicas": int,
    "restartPolicy": ("Always", "OnFailure", "Never", "ExitCode"),
    "template": {"metadata": {str: object}, "spec": POD},
}
PYTORCHJOB = {
    "apiVersion": ("kubeflow.org/v1",),
    "kind": ("PyTorchJob",),
    "metadata": {"name": str, "namespace": str},
    "spec": {
        "nprocPerNode": str,
        "runPolicy": {
            "activeDeadlineSeconds": int,
            "backoffLimit": int,
            "cleanPodPolicy": ("All", "Running", "None"),
            "suspend": bool,
            "ttlSecondsAfterFinished": int,
        },
        "elasticPolicy": {
            "rdzvBackend": ("c10d", "etcd", "etcd-v2"),
            "rdzvHost": str,
            "rdzvId": str,
            "rdzvPort": int,
            "standalone": bool,
            "minReplicas": int,
            "maxReplicas": int,
            "maxRestarts": int,
        },
        "pytorchReplicaSpecs": {"Master": REPLICA, "Worker": REPLICA},
    },
}
TRAINJOB = {
    "apiVersion": ("trainer.kubeflow.org/v1alpha1",),
    "kind": ("TrainJob",),
    "metadata": {"name": str, "namespace": str},
    "spec": {
        "runtimeRef": {"apiGroup": str, "kind": str, "name": str},
        "suspend": bool,
        "trainer": {
            "image": str,
            "command": [str],
            "args": [str],
            "env": [{"name": str, "value": str}],
            "numNodes": int,
            "numProcPerNode": (int, str),
            "resourcesPerNode": RESOURCES,
        },
    },
}


def problems(found: Any, expected: Any, place: str = "") -> list[str]:
    """The fields of `found` that are unknown or of another type than `expected`, each by its place."""
    if isinstance(expected, dict):
        if not isinstance(found, dict):
            return [f"{place}: {found!r} is no mapping"]
        any_name = expected.get(str)
        return [
            problem
            for name, value in found.items()
            for problem in (
                problems(value, expected.get(name, any_name), f"{place}.{name}")
                if name in expected or any_name is not None
                else [f"{place}.{name}: unknown"]
            )
        ]
    if isinstance(expected, list):
        if not isinstance(found, list):
            return [f"{place}: {found!r} is no list"]
        items = [(f"{place}[{number}]", item) for number, item in enumerate(found)]
        return [problem for where, item in items for problem in problems(item, expected[0], where)]
    if isinstance(expected, tuple) and isinstance(expected[0], str):
        return [] if found in expected else [f"{place}: {found!r} is none of {expected}"]
    is_right = isinstance(found, expected) and not (isinstance(found, bool) and expected is int)
    return [] if is_right else [f"{place}: {found!r} is no {expected}"]
