// A client of the official Go SDK that takes every step of the corners. As corner_client.py does for
// Python: the same steps, the same document.
//
//	corner_client TARGET legacy|auto TRACE [MEMBER]
//
// The SDK knows no way to speak the newest revision alone: it falls back by itself.
package main

import (
	"cmp"
	"context"
	"crypto/rand"
	"encoding/json"
	"errors"
	"log"
	"os"
	"os/exec"
	"runtime/debug"
	"slices"
	"strings"
	"sync"
	"time"

	"github.com/modelcontextprotocol/go-sdk/jsonrpc"
	"github.com/modelcontextprotocol/go-sdk/mcp"
)

const (
	stepTime  = 6 * time.Second
	startTime = 25 * time.Second // of what may have to wait for servers that start
	allTime  = 45 * time.Second
	patience = 3 * time.Second

	acknowledged = "notifications/subscriptions/acknowledged"
	message      = "notifications/message"
	progress     = "notifications/progress"
	updated      = "notifications/resources/updated"
)

type object = map[string]any

// --- one session ---------------------------------------------------------------------------------

// What is to be done with a member of a group: its names and URIs begin so, and these tools of other
// members are called.
type member struct {
	Names string
	URIs  string
	Calls []call
}

type call struct {
	name      string
	arguments object
}

// A call is a list of both.
func (c *call) UnmarshalJSON(text []byte) error {
	return json.Unmarshal(text, &[]any{&c.name, &c.arguments})
}

type notification struct {
	method string
	params object
}

// A session, and what came to it unasked.
type corner struct {
	member   member
	session  *mcp.ClientSession
	isModern bool
	trace    string
	label    string

	lock  sync.Mutex
	asked [][]string
	heard []notification
}

func (c *corner) options() *mcp.ClientOptions {
	return &mcp.ClientOptions{
		Capabilities: &mcp.ClientCapabilities{
			RootsV2: &mcp.RootCapabilities{},
			Elicitation: &mcp.ElicitationCapabilities{
				Form: &mcp.FormElicitationCapabilities{},
				URL:  &mcp.URLElicitationCapabilities{},
			},
		},
		ElicitationHandler:   c.elicited,
		CreateMessageHandler: c.sampled,
		// What is heard is noted elsewhere; without these nothing is listened to.
		ToolListChangedHandler:     func(context.Context, *mcp.ToolListChangedRequest) {},
		PromptListChangedHandler:   func(context.Context, *mcp.PromptListChangedRequest) {},
		ResourceListChangedHandler: func(context.Context, *mcp.ResourceListChangedRequest) {},
	}
}

func (c *corner) elicited(_ context.Context, request *mcp.ElicitRequest) (*mcp.ElicitResult, error) {
	mode, text := cmp.Or(request.Params.Mode, "form"), request.Params.Message
	c.note("elicitation "+mode, text)
	if mode == "url" {
		return &mcp.ElicitResult{Action: "accept"}, nil
	}
	return &mcp.ElicitResult{Action: "accept", Content: object{"answer": "answer to " + text}}, nil
}

func (c *corner) sampled(_ context.Context, request *mcp.CreateMessageRequest) (*mcp.CreateMessageResult, error) {
	text := request.Params.Messages[0].Content.(*mcp.TextContent).Text
	c.note("sampling", text)
	thought := &mcp.TextContent{Text: "thought on " + text}
	return &mcp.CreateMessageResult{Role: "assistant", Content: thought, Model: "none"}, nil
}

// Notes notifications, and a request for the roots, which the SDK answers by itself.
func (c *corner) receiving(next mcp.MethodHandler) mcp.MethodHandler {
	return func(ctx context.Context, method string, request mcp.Request) (mcp.Result, error) {
		if method == "roots/list" {
			c.note("roots", "")
		} else if strings.HasPrefix(method, "notifications/") {
			var params object
			text, _ := json.Marshal(request.GetParams())
			_ = json.Unmarshal(text, &params)
			c.lock.Lock()
			c.heard = append(c.heard, notification{method, params})
			c.lock.Unlock()
		}
		return next(ctx, method, request)
	}
}

func (c *corner) note(kind, text string) {
	c.lock.Lock()
	defer c.lock.Unlock()
	c.asked = append(c.asked, []string{kind, text})
}

func (c *corner) forget() {
	c.lock.Lock()
	defer c.lock.Unlock()
	c.asked, c.heard = [][]string{}, nil
}

// The params of the notifications of a method.
func (c *corner) heardOf(method string) []object {
	c.lock.Lock()
	defer c.lock.Unlock()
	var found []object
	for _, it := range c.heard {
		if it.method == method {
			found = append(found, it.params)
		}
	}
	return found
}

// Waits until so many notifications of a method were heard.
func (c *corner) awaitHeard(method string, count int, limit time.Duration) {
	until(limit, func() bool { return len(c.heardOf(method)) >= count })
}

// Whether it came true in time.
func until(limit time.Duration, condition func() bool) bool {
	end := time.Now().Add(limit)
	for !condition() && time.Now().Before(end) {
		time.Sleep(20 * time.Millisecond)
	}
	return condition()
}

func (c *corner) call(ctx context.Context, name string, given object, meta mcp.Meta) (*mcp.CallToolResult, error) {
	params := &mcp.CallToolParams{Name: c.member.Names + name, Arguments: given, Meta: meta}
	return c.session.CallTool(ctx, params)
}

// What of a list is the server's, without what it begins with.
func own(listed []string, start string) []string {
	var found []string
	for _, it := range listed {
		if rest, isOwn := strings.CutPrefix(it, start); isOwn {
			found = append(found, rest)
		}
	}
	return found
}

// What was asked while something ran, and what came of it.
func (c *corner) beAsked(answered func() (any, error)) (any, error) {
	c.forget()
	answer, err := answered()
	c.lock.Lock()
	defer c.lock.Unlock()
	slices.SortFunc(c.asked, slices.Compare)
	return object{"asked": c.asked, "answer": answer}, err
}

func (c *corner) ask(ctx context.Context, tool string, given object) (any, error) {
	return c.beAsked(func() (any, error) { return c.structured(ctx, tool, given) })
}

func (c *corner) structured(ctx context.Context, tool string, given object) (any, error) {
	result, err := c.call(ctx, tool, given, nil)
	if err != nil {
		return nil, err
	}
	return result.StructuredContent, nil
}

// --- what is done in each session, in this order -------------------------------------------------

type step struct {
	name string
	take func(*corner, context.Context) (any, error)
}

var steps = []step{
	{"tools", (*corner).tools},
	{"echo", (*corner).echo},
	{"count", (*corner).count},
	{"header", (*corner).header},
	{"unknown_tool", (*corner).unknownTool},
	{"failing", (*corner).failing},
	{"refused", (*corner).refused},
	{"ask_form", asking("form")},
	{"ask_url", asking("url")},
	{"ask_sampling", asking("sampling")},
	{"ask_roots", asking("roots")},
	{"ask_both", asking("both")},
	{"chain", (*corner).chain},
	{"ask_in_prompt", (*corner).askInPrompt},
	{"ask_in_resource", (*corner).askInResource},
	{"url_required", (*corner).urlRequired},
	{"resources", (*corner).resources},
	{"templates", (*corner).templates},
	{"unknown_resource", (*corner).unknownResource},
	{"prompts", (*corner).prompts},
	{"completion", (*corner).completion},
	{"log_before_a_level", (*corner).logBeforeALevel},
	{"log_at_a_level", (*corner).logAtALevel},
	{"updates", (*corner).updates},
	{"changes", (*corner).changes},
	{"cancelled", (*corner).cancelled},
}

func (c *corner) tools(ctx context.Context) (any, error) {
	listed, err := c.session.ListTools(ctx, nil)
	if err != nil {
		return nil, err
	}
	var names []string
	for _, it := range listed.Tools {
		names = append(names, it.Name)
	}
	return own(names, c.member.Names), nil
}

func (c *corner) echo(ctx context.Context) (any, error) {
	result, err := c.call(ctx, "echo", object{"text": "Grüße, 世界 \U0001F44B"}, nil)
	if err != nil {
		return nil, err
	}
	return []any{textOf(result), result.StructuredContent}, nil
}

func (c *corner) count(ctx context.Context) (any, error) {
	c.forget()
	given := &mcp.CallToolParams{Name: c.member.Names + "count", Arguments: object{"to": 3, "pause": 0.1}}
	given.SetProgressToken("count " + c.label)
	result, err := c.session.CallTool(ctx, given)
	if err != nil {
		return nil, err
	}
	c.awaitHeard(progress, 3, time.Second) // the SDK may be still at it
	var told [][]any
	for _, it := range c.heardOf(progress) {
		told = append(told, []any{it["progress"], it["total"], it["message"]})
	}
	return []any{told, result.StructuredContent}, nil
}

func (c *corner) header(ctx context.Context) (any, error) {
	return c.structured(ctx, "header", object{"region": "Zürich 1", "query": "all"})
}

func (c *corner) unknownTool(ctx context.Context) (any, error) {
	return c.call(ctx, "no such tool", nil, nil)
}

func (c *corner) failing(ctx context.Context) (any, error) {
	result, err := c.call(ctx, "fail", nil, nil)
	if err != nil {
		return nil, err
	}
	return []any{result.IsError, textOf(result)}, nil
}

func (c *corner) refused(ctx context.Context) (any, error) {
	return c.call(ctx, "fail", object{"error": object{"code": -31999, "message": "no"}}, nil)
}

func asking(kind string) func(*corner, context.Context) (any, error) {
	return func(c *corner, ctx context.Context) (any, error) {
		return c.ask(ctx, "ask", object{"kind": kind})
	}
}

func (c *corner) chain(ctx context.Context) (any, error) {
	return c.ask(ctx, "chain", object{"rounds": 3})
}

func (c *corner) askInPrompt(ctx context.Context) (any, error) {
	return c.beAsked(func() (any, error) {
		got, err := c.session.GetPrompt(ctx, &mcp.GetPromptParams{Name: c.member.Names + "asking"})
		if err != nil {
			return nil, err
		}
		return json.RawMessage(promptText(got)), nil
	})
}

func (c *corner) askInResource(ctx context.Context) (any, error) {
	return c.beAsked(func() (any, error) {
		read, err := c.session.ReadResource(ctx, &mcp.ReadResourceParams{URI: c.member.URIs + "demo://asking"})
		if err != nil {
			return nil, err
		}
		return json.RawMessage(read.Contents[0].Text), nil
	})
}

func (c *corner) urlRequired(ctx context.Context) (any, error) {
	return c.ask(ctx, "url_required", object{"key": c.label})
}

func (c *corner) resources(ctx context.Context) (any, error) {
	listed, err := c.session.ListResources(ctx, nil)
	if err != nil {
		return nil, err
	}
	var uris []string
	for _, it := range listed.Resources {
		uris = append(uris, it.URI)
	}
	read, err := c.session.ReadResource(ctx, &mcp.ReadResourceParams{URI: c.member.URIs + "demo://item/7"})
	if err != nil {
		return nil, err
	}
	return []any{own(uris, c.member.URIs), read.Contents[0].Text}, nil
}

func (c *corner) templates(ctx context.Context) (any, error) {
	listed, err := c.session.ListResourceTemplates(ctx, nil)
	if err != nil {
		return nil, err
	}
	var uris []string
	for _, it := range listed.ResourceTemplates {
		uris = append(uris, it.URITemplate)
	}
	return own(uris, c.member.URIs), nil
}

func (c *corner) unknownResource(ctx context.Context) (any, error) {
	return c.session.ReadResource(ctx, &mcp.ReadResourceParams{URI: c.member.URIs + "demo://none"})
}

func (c *corner) prompts(ctx context.Context) (any, error) {
	listed, err := c.session.ListPrompts(ctx, nil)
	if err != nil {
		return nil, err
	}
	var names []string
	for _, it := range listed.Prompts {
		names = append(names, it.Name)
	}
	arguments := map[string]string{"name": "Eve"}
	given := &mcp.GetPromptParams{Name: c.member.Names + "greet", Arguments: arguments}
	got, err := c.session.GetPrompt(ctx, given)
	if err != nil {
		return nil, err
	}
	return []any{own(names, c.member.Names), promptText(got)}, nil
}

func (c *corner) completion(ctx context.Context) (any, error) {
	result, err := c.session.Complete(ctx, &mcp.CompleteParams{
		Ref:      &mcp.CompleteReference{Type: "ref/prompt", Name: c.member.Names + "greet"},
		Argument: mcp.CompleteParamsArgument{Name: "name", Value: "par"},
	})
	if err != nil {
		return nil, err
	}
	return result.Completion.Values, nil
}

func (c *corner) logBeforeALevel(ctx context.Context) (any, error) {
	return c.logged(ctx, 1, nil)
}

func (c *corner) logAtALevel(ctx context.Context) (any, error) {
	if c.isModern {
		return c.logged(ctx, 2, mcp.Meta{mcp.MetaKeyLogLevel: "warning"})
	}
	if err := c.session.SetLoggingLevel(ctx, &mcp.SetLoggingLevelParams{Level: "warning"}); err != nil {
		return nil, err
	}
	return c.logged(ctx, 2, nil)
}

// The log messages of a call.
func (c *corner) logged(ctx context.Context, expected int, meta mcp.Meta) (any, error) {
	c.forget()
	if _, err := c.call(ctx, "log", object{"label": c.label}, meta); err != nil {
		return nil, err
	}
	c.awaitHeard(message, expected, time.Second)
	found := [][]any{}
	for _, it := range c.heardOf(message) {
		text := strings.Replace(it["data"].(string), c.label, "my", 1)
		found = append(found, []any{it["level"], it["logger"], text})
	}
	return found, nil
}

func (c *corner) updates(ctx context.Context) (any, error) {
	c.forget()
	watched := "demo://watched"
	if err := c.session.Subscribe(ctx, &mcp.SubscribeParams{URI: c.member.URIs + watched}); err != nil {
		return nil, err
	}
	if c.isModern { // where Subscribe does not wait for it
		c.awaitHeard(acknowledged, 1, patience)
	}
	for _, uri := range []string{"demo://static", watched} {
		if _, err := c.call(ctx, "notify", object{"kinds": []string{"updated"}, "uri": uri}, nil); err != nil {
			return nil, err
		}
	}
	c.awaitHeard(updated, 1, patience)
	if err := c.session.Unsubscribe(ctx, &mcp.UnsubscribeParams{URI: c.member.URIs + watched}); err != nil {
		return nil, err
	}
	var uris []string
	for _, it := range c.heardOf(updated) {
		uris = append(uris, it["uri"].(string))
	}
	return own(uris, c.member.URIs), nil
}

func (c *corner) changes(ctx context.Context) (any, error) {
	c.forget()
	given := object{"kinds": []string{"tools", "prompts", "resources"}}
	if _, err := c.call(ctx, "notify", given, nil); err != nil {
		return nil, err
	}
	var kinds []string
	for _, it := range []string{"prompt", "resource", "tool"} {
		method := "notifications/" + it + "s/list_changed"
		c.awaitHeard(method, 1, patience)
		if len(c.heardOf(method)) > 0 {
			kinds = append(kinds, it)
		}
	}
	return kinds, nil
}

func (c *corner) cancelled(ctx context.Context) (any, error) {
	c.forget()
	arguments := object{"seconds": 60, "label": c.label}
	given := &mcp.CallToolParams{Name: c.member.Names + "slow", Arguments: arguments}
	given.SetProgressToken("slow " + c.label)
	slow, cancel := context.WithCancel(ctx)
	defer cancel()
	ended := make(chan error, 1)
	go func() {
		_, err := c.session.CallTool(slow, given)
		ended <- err
	}()
	c.awaitHeard(progress, 1, patience)
	cancel()
	<-ended
	isCancelled := until(patience, func() bool {
		text, _ := os.ReadFile(c.trace)
		return slices.ContainsFunc(strings.Split(string(text), "\n"), func(line string) bool {
			return strings.HasPrefix(line, "cancelled") && strings.HasSuffix(line, c.label)
		})
	})
	echoed, err := c.echo(ctx)
	return []any{isCancelled, echoed}, err
}

func textOf(result *mcp.CallToolResult) string {
	return result.Content[0].(*mcp.TextContent).Text
}

func promptText(result *mcp.GetPromptResult) string {
	return result.Messages[0].Content.(*mcp.TextContent).Text
}

// --- all of them ---------------------------------------------------------------------------------

// What a step gives, or how it failed.
func outcome(c *corner, taken step, limit time.Duration) any {
	ctx, cancel := context.WithTimeout(context.Background(), limit)
	defer cancel()
	found, err := taken.take(c, ctx)
	var refusal *jsonrpc.Error
	if errors.As(err, &refusal) {
		return object{"error": refusal.Code, "message": refusal.Message}
	}
	if err != nil {
		return object{"failed": err.Error()}
	}
	return found
}

// A step that calls a tool of another server.
func calling(given call) step {
	return step{given.name, func(c *corner, ctx context.Context) (any, error) {
		params := &mcp.CallToolParams{Name: given.name, Arguments: given.arguments}
		result, err := c.session.CallTool(ctx, params)
		if err != nil {
			return nil, err
		}
		var texts []string
		for _, it := range result.Content {
			texts = append(texts, it.(*mcp.TextContent).Text)
		}
		return []any{result.IsError, texts}, nil
	}}
}

func transportTo(target string) mcp.Transport {
	if strings.HasPrefix(target, "http") {
		return &mcp.StreamableClientTransport{Endpoint: target}
	}
	var command []string
	if err := json.Unmarshal([]byte(target), &command); err != nil {
		log.Fatal(err)
	}
	return &mcp.CommandTransport{Command: exec.Command(command[0], command[1:]...)}
}

func sdkVersion() string {
	built, _ := debug.ReadBuildInfo()
	for _, it := range built.Deps {
		if it.Path == "github.com/modelcontextprotocol/go-sdk" {
			return strings.TrimPrefix(it.Version, "v")
		}
	}
	return ""
}

func main() {
	target, mode, trace := os.Args[1], os.Args[2], os.Args[3]
	c := &corner{trace: trace, label: rand.Text()}
	if len(os.Args) > 4 {
		if err := json.Unmarshal([]byte(os.Args[4]), &c.member); err != nil {
			log.Fatal(err)
		}
	}
	client := mcp.NewClient(&mcp.Implementation{Name: "corner", Version: "1"}, c.options())
	client.AddRoots(&mcp.Root{URI: "file:///corner", Name: "corner"})
	client.AddReceivingMiddleware(c.receiving)
	var options *mcp.ClientSessionOptions
	if mode == "legacy" {
		options = &mcp.ClientSessionOptions{ProtocolVersion: "2025-11-25"}
	}
	session, err := client.Connect(context.Background(), transportTo(target), options)
	if err != nil {
		log.Fatal(err)
	}
	c.session = session
	revision := session.InitializeResult().ProtocolVersion
	c.isModern = revision >= "2026"
	record := object{"sdk": sdkVersion(), "revision": revision}
	end := time.Now().Add(allTime)
	for _, taken := range steps {
		limit := stepTime
		if taken.name == "tools" {
			limit = startTime
		}
		if time.Now().After(end) {
			record[taken.name] = object{"failed": "not tried"}
		} else {
			record[taken.name] = outcome(c, taken, limit)
		}
	}
	calls := []any{}
	for _, it := range c.member.Calls {
		calls = append(calls, outcome(c, calling(it), startTime))
	}
	record["calls"] = calls
	session.Close()
	if err := json.NewEncoder(os.Stdout).Encode(record); err != nil {
		log.Fatal(err)
	}
}
