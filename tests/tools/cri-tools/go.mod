module tools

go 1.25

require sigs.k8s.io/cri-tools v1.36.0
