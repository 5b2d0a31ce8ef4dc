// The reference library drives the plugin through all verbs, as a runtime would. Whatever libcni does not accept ends the
// program with its words.
//
// Usage: libcni BINDIR CACHEDIR NETNS NETNS CONFLIST
package main

import (
	"context"
	"fmt"
	"os"
	"time"

	"github.com/containernetworking/cni/libcni"
	"github.com/containernetworking/cni/pkg/types"
	types100 "github.com/containernetworking/cni/pkg/types/100"
	"github.com/containernetworking/cni/pkg/version"
)

func must(what string, err error) {
	if err != nil {
		fmt.Printf("%s: %v\n", what, err)
		os.Exit(1)
	}
}

func require(what string, holds bool) {
	if !holds {
		fmt.Printf("%s: not so\n", what)
		os.Exit(1)
	}
}

func attachment(id, netns string) *libcni.RuntimeConf {
	return &libcni.RuntimeConf{
		ContainerID: id,
		NetNS:       netns,
		IfName:      "eth0",
		Args: [][2]string{
			{"IgnoreUnknown", "1"},
			{"K8S_POD_NAMESPACE", "default"},
			{"K8S_POD_NAME", id},
			{"K8S_POD_INFRA_CONTAINER_ID", id},
			{"K8S_POD_UID", "uid-" + id},
		},
		CapabilityArgs: map[string]interface{}{
			"io.kubernetes.cri.pod-annotations": map[string]string{"a": "b"},
		},
	}
}

func main() {
	require("five arguments", len(os.Args) == 6)
	bin, cache := os.Args[1], os.Args[2]
	ctx, cancel := context.WithTimeout(context.Background(), time.Minute)
	defer cancel()

	list, err := libcni.ConfListFromBytes([]byte(os.Args[5]))
	must("reading the network configuration", err)
	cni := libcni.NewCNIConfigWithCacheDir([]string{bin}, cache, nil)

	info, err := cni.GetVersionInfo(ctx, "aws-cni")
	must("VERSION", err)
	require("all published versions are supported", len(info.SupportedVersions()) == len(version.All.SupportedVersions()))
	_, err = cni.ValidateNetworkList(ctx, list)
	must("validating the configuration against VERSION", err)

	must("STATUS", cni.GetStatusNetworkList(ctx, list))

	one, two := attachment("one", os.Args[3]), attachment("two", os.Args[4])
	for _, rt := range []*libcni.RuntimeConf{one, two} {
		answer, err := cni.AddNetworkList(ctx, list, rt)
		must("ADD "+rt.ContainerID, err)
		require("the result has the version of the configuration", answer.Version() == list.CNIVersion)
		result, err := types100.NewResultFromResult(answer)
		must("reading the result", err)
		require("three interfaces", len(result.Interfaces) == 3)
		require("one address", len(result.IPs) == 1)
		inside := result.Interfaces[*result.IPs[0].Interface]
		require("the address is on eth0 in the namespace", inside.Name == "eth0" && inside.Sandbox == rt.NetNS)
		ones, bits := result.IPs[0].Address.Mask.Size()
		require("the address stands alone", ones == bits)
	}

	_, err = cni.AddNetworkList(ctx, list, one)
	require("a second ADD of the same interface fails", err != nil)

	checks, _ := version.GreaterThanOrEqualTo(list.CNIVersion, "0.4.0")
	if checks {
		must("CHECK", cni.CheckNetworkList(ctx, list, two))
	}

	must("DEL", cni.DelNetworkList(ctx, list, two))
	must("DEL again", cni.DelNetworkList(ctx, list, two))
	if checks {
		// What a failed second ADD left to the runtime's cache is the first result still.
		must("DEL", cni.DelNetworkList(ctx, list, one))
	}

	collects, _ := version.GreaterThanOrEqualTo(list.CNIVersion, "1.1.0")
	if collects {
		_, err = cni.AddNetworkList(ctx, list, one)
		must("ADD before GC", err)
		keep := []types.GCAttachment{{ContainerID: "one", IfName: "eth0"}}
		must("GC that keeps", cni.GCNetworkList(ctx, list, &libcni.GCArgs{ValidAttachments: keep}))
		must("CHECK after GC", cni.CheckNetworkList(ctx, list, one))
		must("GC of everything", cni.GCNetworkList(ctx, list, &libcni.GCArgs{ValidAttachments: []types.GCAttachment{}}))
	}
	must("DEL at the end", cni.DelNetworkList(ctx, list, one))
	fmt.Printf("libcni is content with %s\n", list.CNIVersion)
}
