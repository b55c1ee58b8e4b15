module tools

go 1.25

require github.com/containerd/containerd v1.7.35
