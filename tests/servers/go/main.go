// A streamable HTTP server of the official Go SDK: go run . PORT
//
// Its tool `echo` says what was said. stderr says where it listens.
package main

import (
	"context"
	"fmt"
	"log"
	"net"
	"net/http"
	"os"

	"github.com/modelcontextprotocol/go-sdk/mcp"
)

type said struct {
	Message string `json:"message"`
}

func echo(_ context.Context, _ *mcp.CallToolRequest, given said) (*mcp.CallToolResult, any, error) {
	text := &mcp.TextContent{Text: "Echo: " + given.Message}
	return &mcp.CallToolResult{Content: []mcp.Content{text}}, nil, nil
}

func main() {
	server := mcp.NewServer(&mcp.Implementation{Name: "streamable", Version: "1"}, nil)
	mcp.AddTool(server, &mcp.Tool{Name: "echo"}, echo)
	choose := func(*http.Request) *mcp.Server { return server }
	listener, err := net.Listen("tcp", "127.0.0.1:"+os.Args[1])
	if err != nil {
		log.Fatal(err)
	}
	fmt.Fprintf(os.Stderr, "listening on http://%s\n", listener.Addr())
	log.Fatal(http.Serve(listener, mcp.NewStreamableHTTPHandler(choose, nil)))
}
